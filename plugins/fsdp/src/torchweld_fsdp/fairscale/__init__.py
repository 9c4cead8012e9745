"""FairScale's sharded family: ``fairscale_oss``, ``fairscale_sdp`` and ``fairscale_fsdp``.

:mod:`~torchweld_fsdp.fairscale.components` is light; the strategies are imported when chosen.
"""
