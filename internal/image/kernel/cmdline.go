package kernel

import (
	"strings"

	"github.com/agentiso/agentiso/internal/domain"
)

// arguments are what makes a kernel boot faster as a guest. Figures are medians
// of 5 or 6 boots under TCG on a busy two-core host, QEMU's exec to the agent's
// first line, of the lean kernel (0.89 s without any) and of Debian's 6.1
// (2.03 s).
//
// Tried and left out: nolapic_timer skips two calibrations of the APIC timer
// and saves 200 ms, but the PIT in its place wakes an idle guest 140 times a
// second more (CPU 5 to 16 ms per second), and Debian's kernel hangs with it.
// mitigations=off, rodata=off, tsc=reliable and unsigned or stripped modules
// made no difference beyond the noise.
var arguments = []struct {
	text string
	when func(domain.Kernel) bool // nil: always
}{
	// Leave lock prefixes in on one CPU: patching them out under emulation
	// throws translated code away. Lean −110 ms, Debian −200 ms.
	{"noreplace-smp", nil},
	// No self-tests of ciphers at each boot. Debian −450 ms; the lean kernel is
	// built without.
	{"cryptomgr.notests", func(k domain.Kernel) bool { return k.NeedsACPI }},
	// Grace periods end at once rather than after some ticks: unmounting,
	// network namespaces, and the way down (56 to 41 ms).
	{"rcupdate.rcu_expedited=1", nil},
}

// CommandLine is what kernel k wants on its command line in any machine. The
// machine's owner adds console, what the accelerator needs (no_timer_check,
// tsc_early_khz), what makes a panic and a reset end QEMU (panic=-1 reboot=t),
// and agentiso.init and agentiso.link for the agent.
func CommandLine(k domain.Kernel) string {
	var words []string
	for _, a := range arguments {
		if a.when == nil || a.when(k) {
			words = append(words, a.text)
		}
	}
	return strings.Join(words, " ")
}
