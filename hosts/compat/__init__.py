"""Everything that is specific to the existing clients: argument names, routes and encodings."""
