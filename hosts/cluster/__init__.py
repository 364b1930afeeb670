"""Several hosts behind one address: a gateway and replicas in Ray placement groups.

Only two files import ray.
"""
