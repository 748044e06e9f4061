from keras_mom.layers.mom_layer import MoMLayer

__all__ = ["MoMLayer"]
