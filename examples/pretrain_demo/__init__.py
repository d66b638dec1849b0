"""Pretrains the small vision transformer that vpt_fast ships, on drawn letters and symbols."""
