"""gsplat.cuda: the pieces of the rasterizer (here on every device)."""
