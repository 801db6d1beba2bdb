"""What the image of the HTTP steps runs."""
