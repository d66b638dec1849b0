"""Serves a `vpt_fast.PromptBank` over HTTP; README.md beside this file says how."""
