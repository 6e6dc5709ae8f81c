"""The dilated convolution over time."""
