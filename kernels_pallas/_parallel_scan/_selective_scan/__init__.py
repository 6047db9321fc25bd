"""The selective scan of Mamba; its public names are in `kernels_pallas`."""
