"""Trains a model on two logical CPU devices, and alone; prints what both become.

Run by `test_tensorflow.py`, in a process of its own: devices are made at its start.
Alone, XLA compiles the training step as it is shipped, without the tests' flags.
"""

import json
import os

os.environ.pop("XLA_FLAGS", None)

import numpy as np
import tensorflow as tf


def main():
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    import keras

    import keras_mom

    random = np.random.default_rng(0)
    inputs = random.normal(size=(8, 20, 16)).astype("float32")
    targets = np.roll(inputs, 1, axis=1)

    def trained(strategy, jit_compile):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            tokens = keras.Input((None, 16))
            # The balance of a replica's own tokens is not that of all.
            layer = keras_mom.MoMLayer(2, 8, balance_loss_weight=0.0)
            model = keras.Model(tokens, layer(tokens))
            model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        history = model.fit(
            inputs, targets, batch_size=4, epochs=2, shuffle=False, verbose=0
        )
        weights = [np.asarray(x).tolist() for x in model.get_weights()]
        return {"loss": history.history["loss"], "weights": weights}

    found = [
        trained(tf.distribute.get_strategy(), True),
        trained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), False),
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
