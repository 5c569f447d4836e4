"""Figures of afbus beside plain pipes, taken in turns in one run: `make bench`.

stage.py    processes: an agent, a master that grants everything, and the players of a row
rows.py     what is measured: one function a row and system
__main__.py runs the rows in turns, prints the table, writes results.json

Nothing here decides whether anything is good enough, and no figure fails a build.
"""
