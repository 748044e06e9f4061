"""The base classes of the models."""

import keras

Backbone = keras.Model
CausalLM = keras.Model
