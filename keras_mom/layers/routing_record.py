"""What a routed layer remembers of its last training batch, and its balance loss."""

from typing import Any

from keras import ops


class RoutingRecordMixin:
    """Routing statistics in weights that are not trained, for a layer that routes.

    The layer has a `balance_loss_weight`. Metrics would not do: on JAX those that are
    updated inside `call` are lost.
    """

    balance_loss_weight: float
    add_weight: Any
    add_loss: Any

    def _create_record(self, choices):
        """Adds the weights, for `choices` memories or experts; for `build`."""
        settings: dict[str, Any] = dict(
            initializer="zeros", dtype="float32", trainable=False, aggregation="mean"
        )
        self.routing_share = self.add_weight(
            shape=(choices,), name="routing_share", **settings
        )
        self.router_entropy = self.add_weight(
            shape=(), name="router_entropy", **settings
        )

    def _record_routing(self, training, statistics):
        """Writes what a call leaves behind: the loss, and in training the weights."""
        if self.balance_loss_weight:
            self.add_loss(self.balance_loss_weight * statistics.balance_loss)
        if training:
            self.routing_share.assign(ops.stop_gradient(statistics.share))
            self.router_entropy.assign(ops.stop_gradient(statistics.entropy))

    @property
    def routing_statistics(self):
        """Routing in the last training batch, as NumPy values.

        A dict: `share`, float32 `[M]`, the share of the routed tokens that each memory
        or expert got, and `entropy`, the mean entropy of the router's probabilities in
        nats. On JAX, `model.fit` writes variables back at the end of an epoch; a
        callback reads them earlier after `model.jax_state_sync()`.
        """
        return {
            "share": ops.convert_to_numpy(self.routing_share),
            "entropy": float(ops.convert_to_numpy(self.router_entropy)),
        }
