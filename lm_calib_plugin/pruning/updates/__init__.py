"""What the kept weights become: one re-fit a file."""
