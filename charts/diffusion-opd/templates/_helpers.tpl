{{- define "diffusion-opd.selector" -}}
app.kubernetes.io/name: diffusion-opd
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- /* Labels of every object; a label of commonLabels does not replace one of these. */ -}}
{{- define "diffusion-opd.labels" -}}
{{- $own := include "diffusion-opd.selector" . | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version) -}}
{{- merge $own .Values.commonLabels | toYaml -}}
{{- end }}

{{- define "diffusion-opd.name" -}}
{{- $chart := .Values.nameOverride | default .Chart.Name -}}
{{- $made := contains $chart .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $chart) -}}
{{- .Values.fullnameOverride | default $made | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- /* Image of a role: list of the root context and the role. */ -}}
{{- define "diffusion-opd.image" -}}
{{- $root := index . 0 -}}
{{- $name := index $root.Values.images (index . 1) -}}
{{- $root.Values.images.registry }}{{ $name }}{{ if not (contains "@" $name) }}:{{ $root.Values.images.tag | default $root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- /* A restricted pod that runs as the images' user, or as the one that the cluster gives it. */ -}}
{{- define "diffusion-opd.podSecurity" -}}
{{- $user := .Values.fixedUser | ternary (dict "runAsUser" 65532 "runAsGroup" 65532) dict -}}
{{- $restricted := dict "runAsNonRoot" true "seccompProfile" (dict "type" "RuntimeDefault") -}}
{{- merge (deepCopy .Values.podSecurityContext) $user $restricted | toYaml -}}
{{- end }}

{{- define "diffusion-opd.containerSecurity" -}}
{{- $none := dict "drop" (list "ALL") -}}
{{- $restricted := dict "allowPrivilegeEscalation" false "readOnlyRootFilesystem" true "capabilities" $none -}}
{{- mergeOverwrite $restricted (deepCopy .Values.securityContext) | toYaml -}}
{{- end }}

{{- /* What the operator may do where its distillations live. A test holds it equal to what it does. */ -}}
{{- define "diffusion-opd.rules" -}}
- apiGroups: [opd.dev]
  resources: [opddistillations]
  verbs: [list, watch, delete] # delete: spec.runPolicy.ttlSecondsAfterFinished
- apiGroups: [opd.dev]
  resources: [opddistillations/status]
  verbs: [patch]
- apiGroups: [opd.dev] # clusters that protect owner references, as OpenShift does, ask for it
  resources: [opddistillations/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [services, serviceaccounts]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps] # named by their content: never changed
  verbs: [list, watch, create, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs] # their templates are immutable: never changed
  verbs: [list, watch, create, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [persistentvolumeclaims] # their access modes, before anything is made for them
  verbs: [get]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
{{- end }}

{{- define "diffusion-opd.editRules" -}}
- apiGroups: [opd.dev]
  resources: [opddistillations, opddistillations/scale]
  verbs: [get, list, watch, create, update, patch, delete, deletecollection]
{{- end }}

{{- define "diffusion-opd.viewRules" -}}
- apiGroups: [opd.dev]
  resources: [opddistillations, opddistillations/status, opddistillations/scale]
  verbs: [get, list, watch]
{{- end }}
