#define LANES 16
#include "kernel.inc.h"
hetero::Kernel hetero::KernelAvx512() { return Run; }
