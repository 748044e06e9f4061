"""Callbacks for `model.fit`."""

from keras_mom.callbacks.routing_monitor import RoutingMonitor

__all__ = ["RoutingMonitor"]
