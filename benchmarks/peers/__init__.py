"""devec against mergekit and a plain copy of the same bytes: seconds, peak memory and exactness of whole runs."""
