package boot

import (
	"fmt"
	"strings"
)

// Cmdline is what the host tells the agent on the kernel command line.
type Cmdline struct {
	Init Mode // agentiso.init, default fast
	Link Link // agentiso.link, default serial
}

// ParseCmdline reads the agent's own parameters from the text of /proc/cmdline
// and passes over everybody else's. Of a parameter given twice the last one
// counts, as with the kernel's own. A value that it does not know is an error:
// guessing would boot a machine that the host cannot reach.
func ParseCmdline(text string) (Cmdline, error) {
	c := Cmdline{Init: Fast, Link: Serial}
	for _, word := range splitCmdline(text) {
		if word == "--" {
			break // what follows is init's, not the kernel's
		}
		key, value, _ := strings.Cut(word, "=")
		switch key {
		case "agentiso.init":
			c.Init = Mode(value)
		case "agentiso.link":
			c.Link = Link(value)
		}
	}
	if c.Init != Fast && c.Init != Image {
		return Cmdline{}, fmt.Errorf("kernel parameter agentiso.init=%q: want fast or image", string(c.Init))
	}
	if c.Link != Serial && c.Link != Vsock {
		return Cmdline{}, fmt.Errorf("kernel parameter agentiso.link=%q: want serial or vsock", string(c.Link))
	}
	return c, nil
}

// splitCmdline splits at white space outside double quotes and drops the
// quotes, as the kernel's next_arg does.
func splitCmdline(text string) []string {
	var words []string
	var b strings.Builder
	var quoted, in bool
	for _, r := range text {
		switch {
		case r == '"':
			quoted, in = !quoted, true
		case !quoted && (r == ' ' || r == '\t' || r == '\n' || r == 0):
			if in {
				words = append(words, b.String())
				b.Reset()
			}
			in = false
		default:
			b.WriteRune(r)
			in = true
		}
	}
	if in {
		words = append(words, b.String())
	}
	return words
}
