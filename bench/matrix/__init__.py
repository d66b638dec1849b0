"""The wheel in fresh environments, with the versions that its metadata allow."""
