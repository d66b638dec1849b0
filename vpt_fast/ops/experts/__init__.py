"""VAPT's prompt experts."""
