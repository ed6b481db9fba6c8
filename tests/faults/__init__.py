"""The fault campaign: commands that are killed, starved of disk and interrupted, and must lose nothing.

``server`` forks trials from a process that has imported everything, ``child`` is what happens inside one (marks of
progress, faults in the calls that change the disk), ``world`` holds the models and commands, ``trial`` plays one
command against one fault and judges what is left.
"""
