"""The door for existing clients: their argument names, routes and encodings, and nothing of them
elsewhere.
"""
