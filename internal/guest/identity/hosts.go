package identity

import (
	"bytes"
	"strings"
)

// maxHosts is the largest /etc/hosts that is kept: block lists have a few MiB.
const maxHosts = 16 << 20

// hostsMark ends the line of /etc/hosts that is the agent's own.
const hostsMark = "# agentiso"

// hostsFile is old with the host's own name on 127.0.1.1 (as Debian has it) in
// place of what the agent wrote before, and with localhost if it had none.
func hostsFile(old []byte, name string) []byte {
	var b bytes.Buffer
	localhost := false
	for line := range bytes.Lines(old) {
		line = bytes.TrimRight(line, "\n")
		if bytes.HasSuffix(line, []byte(hostsMark)) {
			continue
		}
		fields, _, _ := bytes.Cut(line, []byte("#"))
		for i, f := range bytes.Fields(fields) {
			localhost = localhost || i > 0 && string(f) == "localhost"
		}
		b.Write(line)
		b.WriteByte('\n')
	}
	if !localhost {
		b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	}
	b.WriteString("127.0.1.1\t" + name)
	if short, _, ok := strings.Cut(name, "."); ok {
		b.WriteString(" " + short)
	}
	b.WriteString("\t" + hostsMark + "\n")
	return b.Bytes()
}
