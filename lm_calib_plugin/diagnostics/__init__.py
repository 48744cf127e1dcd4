"""What compression changed, where, and why: one question a file, one report for all of them."""
