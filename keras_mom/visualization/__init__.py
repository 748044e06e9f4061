"""Pictures of routing: how many tokens, and which, go to which memory.

`RoutingProbe` and `collect_routing` read a model's routing, functions of their result
count, and those named `plot_...` draw, for which matplotlib has to be installed.
"""

from keras_mom.visualization.pictures import (
    new_figure,
    plot_entropy,
    plot_shares,
    plot_text,
    plot_tokens,
    save_figure,
)
from keras_mom.visualization.probe import (
    LayerRouting,
    RoutingProbe,
    collect_routing,
    mom_layers,
)
from keras_mom.visualization.shares import memory_shares, memory_tokens, router_entropy

__all__ = [
    "LayerRouting",
    "RoutingProbe",
    "collect_routing",
    "memory_shares",
    "memory_tokens",
    "mom_layers",
    "new_figure",
    "plot_entropy",
    "plot_shares",
    "plot_text",
    "plot_tokens",
    "router_entropy",
    "save_figure",
]
