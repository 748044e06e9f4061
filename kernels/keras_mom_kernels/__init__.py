"""Reference forms and kernels of the operations of `keras_mom`. Never imports Keras."""
