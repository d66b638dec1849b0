"""VAPT's prompt experts: fold, mix, features."""
