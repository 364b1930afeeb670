"""Process groups: the mesh of a plan, collectives on it, the control group, and alarms."""
