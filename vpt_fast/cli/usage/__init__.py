"""How command lines are read and explained."""
