"""This release beside the one before it: what they say to each other, and what each makes of the other's files."""
