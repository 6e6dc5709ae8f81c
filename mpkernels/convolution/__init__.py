"""Convolutions that do only the work that their dilation, their mask and the past leave."""
