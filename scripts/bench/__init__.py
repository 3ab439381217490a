"""Measurements that anyone with the hardware can make again; what they found is committed beside them."""
