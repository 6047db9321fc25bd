"""Placeholder until the transport problem lands in its own commit."""


class Transport:
    pass
