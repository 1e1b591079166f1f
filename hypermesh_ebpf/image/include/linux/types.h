/* Everything is in linux/kconfig.h, which comes first. */
