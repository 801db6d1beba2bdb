"""What the image of the S3 steps runs."""
