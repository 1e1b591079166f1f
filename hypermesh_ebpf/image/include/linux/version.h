/* LINUX_VERSION_CODE is given on the command line: the running kernel's. */
#pragma once
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
