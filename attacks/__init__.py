"""Attacks on what a finished run gives away, and measures of how much they get."""

if __name__ != "cutlayer.attacks":
    from cutlayer.names import refuse

    refuse(__name__)
