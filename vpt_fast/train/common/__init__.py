"""What all of training shares."""
