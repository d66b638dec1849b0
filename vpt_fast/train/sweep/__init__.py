"""Many runs: grids, then seeds."""
