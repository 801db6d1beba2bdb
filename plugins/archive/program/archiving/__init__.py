"""Unpacking archives of strangers without harm, and packing our own."""
