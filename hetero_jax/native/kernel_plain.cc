#define LANES 4
#include "kernel.inc.h"
hetero::Kernel hetero::KernelPlain() { return Run; }
