"""Who sends a request: keys, clients, and the proxies that clients come through."""
