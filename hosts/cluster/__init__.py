"""Several hosts behind one address: replicas in Ray placement groups, and the gateway before them.
Two files import ray.
"""
