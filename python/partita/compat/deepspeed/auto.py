"""As the first import of a program: `import deepspeed` means Partita from then on."""

from partita.compat.deepspeed._activate import activate

activate()
