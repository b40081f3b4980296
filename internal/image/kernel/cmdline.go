package kernel

import (
	"strconv"
	"strings"

	"github.com/agentiso/agentiso/internal/domain"
)

// argument is one word of the kernel command line.
type argument struct {
	text string
	when func(domain.Kernel) bool // nil: always
}

func withACPI(k domain.Kernel) bool    { return k.NeedsACPI }
func withoutACPI(k domain.Kernel) bool { return !k.NeedsACPI }

var arguments = []argument{
	{"panic=-1", nil},
	{"reboot=t", nil},
	{"quiet", nil},
	{"acpi=off", withoutACPI},
}

// CommandLine is the kernel command line of a machine, but for what only its
// owner knows (console= and whatever describes its devices). init is "fast" or
// "image"; "" for init or link leaves the parameter to the caller, as in
// domain.Boot.Append. tscKHz is the host's TSC frequency; 0 leaves it to the
// guest to find out.
func CommandLine(k domain.Kernel, init string, link domain.LinkKind, tscKHz int) string {
	var words []string
	for _, a := range arguments {
		if a.when == nil || a.when(k) {
			words = append(words, a.text)
		}
	}
	if tscKHz > 0 {
		words = append(words, "tsc_early_khz="+strconv.Itoa(tscKHz))
	}
	if init != "" {
		words = append(words, "agentiso.init="+init)
	}
	if link != "" {
		words = append(words, "agentiso.link="+string(link))
	}
	return strings.Join(words, " ")
}
