package boot

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

const sysctlRoot = "/proc/sys"

// sysctls is what development machines and containers inside them need beyond
// the kernel's defaults, which are scaled to the small memory of a machine. In
// mode image the distribution's own files decide.
var sysctls = []sysctl{
	// File watchers of editors and bundlers; the kernel's default for 256 MiB is 8192 and 128.
	{"fs.inotify.max_user_watches", "524288"},
	{"fs.inotify.max_user_instances", "1024"},
	// Databases and search engines refuse to start below this.
	{"vm.max_map_count", "262144"},
	// Nested user namespaces (rootless containers, browser sandboxes).
	{"user.max_user_namespaces", "15000"},
	{"kernel.unprivileged_userns_clone", "1"}, // Debian's own switch
	// As inside a container: ping and low ports for ordinary users.
	{"net.ipv4.ping_group_range", "0 2147483647"},
	{"net.ipv4.ip_unprivileged_port_start", "0"},
	// Key rings: runc takes one per container.
	{"kernel.keys.maxkeys", "2000"},
	{"kernel.pid_max", "4194304"},
}

type sysctl struct{ name, value string }

// writeSysctls sets each below root. One that the kernel does not have is not
// an error.
func writeSysctls(root string, all []sysctl) error {
	var errs []error
	for _, s := range all {
		path := filepath.Join(root, strings.ReplaceAll(s.name, ".", "/"))
		err := os.WriteFile(path, []byte(s.value), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
