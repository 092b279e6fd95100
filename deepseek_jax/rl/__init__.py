"""Reinforcement learning from rules: the problems that are asked and the rewards that answers earn.

`problems` enumerates arithmetic problems with worked traces and splits them into held-in and held-out;
`rewards` scores a completion's text. Neither knows of models or of the workflow that uses it.
"""
