"""What a Python user could take instead, one module each, set up as its own documentation advises.

None of them is needed to import this: what is not installed is named, and left out.
"""
