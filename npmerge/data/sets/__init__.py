"""One file a data set; they are found here by :data:`npmerge.catalogue.DATASETS`."""
