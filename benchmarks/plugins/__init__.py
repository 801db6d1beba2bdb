"""The speed of the four plugins against the best tool for each job; `make bench-plugins` prints the table.

What is measured is the program of the step's image, started as the image starts it, without agent and container: those
cost the same whatever the step does, and have their rows in `make bench`.
"""
