/* Asked for by BCC's helpers.h, which uses nothing of it. */
