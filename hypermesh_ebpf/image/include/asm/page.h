/* PAGE_SIZE is given on the command line: the running kernel's. */
