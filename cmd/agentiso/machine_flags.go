package main

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/fault"
)

// machineFlags are what create and run say about a new workspace.
type machineFlags struct {
	name, image, kernel, init string
	cpus                      int
	memory, disk              sizeFlag
	env, envFiles             []string
	workdir, user             string
	internet                  bool
}

func (m *machineFlags) add(a *app, cmd *cobra.Command) {
	m.memory.unit, m.disk.unit = 1<<20, 1<<30
	f := cmd.Flags()
	f.StringVar(&m.name, "name", "", "`name` of the workspace: lower-case letters, digits and hyphens")
	f.StringVar(&m.image, "image", "", "`image` to stand on, by name or digest (default: the configured one)")
	f.StringVar(&m.kernel, "kernel", "", "`kernel` to boot")
	f.StringVar(&m.init, "init", "", "init `mode`: fast (the agent is the init) or image (the image's own init runs)")
	f.IntVar(&m.cpus, "cpus", 0, "virtual CPUs")
	f.Var(&m.memory, "memory", "memory: 512M, 2G; a bare number is MiB")
	f.Var(&m.disk, "disk", "disk: 10G, 512M; a bare number is GiB")
	f.StringArrayVarP(&m.env, "env", "e", nil, "environment variable `KEY=VALUE`, or KEY to take it from here; may be repeated")
	f.StringArrayVar(&m.envFiles, "env-file", nil, "`file` of such lines; may be repeated")
	f.StringVarP(&m.workdir, "workdir", "w", "", "default working `directory` inside")
	f.StringVarP(&m.user, "user", "u", "", "default `user` inside")
	f.BoolVar(&m.internet, "internet", false, "let it reach the internet (default: no network at all)")
	_ = cmd.RegisterFlagCompletionFunc("image", a.completeImages)
	_ = cmd.RegisterFlagCompletionFunc("kernel", a.completeKernels)
	_ = cmd.RegisterFlagCompletionFunc("init", cobra.FixedCompletions([]string{"fast", "image"}, cobra.ShellCompDirectiveNoFileComp))
	for _, name := range []string{"name", "cpus", "memory", "disk", "env", "workdir", "user"} {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
}

func (m *machineFlags) options() (client.CreateOptions, error) {
	env, err := environment(m.envFiles, m.env)
	if err != nil {
		return client.CreateOptions{}, err
	}
	if m.cpus < 0 {
		return client.CreateOptions{}, fault.New(fault.Invalid, "%d vCPUs are not possible", m.cpus).WithNext("Give a positive number, or none for the default.")
	}
	if m.memory.bytes%(1<<20) != 0 {
		return client.CreateOptions{}, fault.New(fault.Invalid, "a memory of %d bytes is not a whole number of MiB", m.memory.bytes).
			WithNext("Give whole MiB, such as 512M.")
	}
	return client.CreateOptions{
		Name: m.name, Image: m.image, Kernel: m.kernel, Init: m.init, CPUs: m.cpus,
		MemoryMiB: m.memory.bytes >> 20, DiskBytes: m.disk.bytes, Env: env,
		Workdir: m.workdir, User: m.user, AllowInternet: m.internet,
	}, nil
}

// environment reads files of KEY=VALUE lines, then entries, of which the last
// wins. An entry without a value is taken from this process; one that is not
// set here is left out.
func environment(files, entries []string) (map[string]string, error) {
	env := map[string]string{}
	put := func(entry, where string) error {
		k, v, given := strings.Cut(entry, "=")
		if k == "" || strings.ContainsAny(k, " \t\x00") {
			return fault.New(fault.Invalid, "%s: %q is not KEY=VALUE", where, entry).WithNext("Write KEY=VALUE, or KEY to take it from this environment.")
		}
		if !given {
			if v, given = os.LookupEnv(k); !given {
				return nil
			}
		}
		env[k] = v
		return nil
	}
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			k := fault.Missing
			if errors.Is(err, fs.ErrNotExist) {
				k = fault.NotFound
			}
			return nil, fault.New(k, "read environment file: %w", err).WithNext("Check the path.")
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			line := strings.TrimLeft(strings.TrimSuffix(lines.Text(), "\r"), " \t")
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			if err := put(line, file); err != nil {
				return nil, err
			}
		}
		if err := lines.Err(); err != nil {
			return nil, fault.New(fault.Invalid, "read environment file %s: %w", file, err).WithNext("Give a text file of KEY=VALUE lines.")
		}
	}
	for _, e := range entries {
		if err := put(e, "--env"); err != nil {
			return nil, err
		}
	}
	if len(env) == 0 {
		return nil, nil //nolint:nilnil // no environment is an empty one
	}
	return env, nil
}
